"""togi.runtime"""
