"""togi.workers"""
