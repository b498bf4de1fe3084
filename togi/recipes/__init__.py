"""togi.recipes"""
