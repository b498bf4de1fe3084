"""togi.config"""
