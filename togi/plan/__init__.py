"""togi.plan"""
