"""togi.data"""
