"""togi.obs"""
