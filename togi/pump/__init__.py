"""togi.pump"""
