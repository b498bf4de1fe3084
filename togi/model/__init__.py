"""togi.model"""
