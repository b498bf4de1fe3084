"""togi.parallel"""
