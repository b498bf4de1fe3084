"""togi.learn"""
