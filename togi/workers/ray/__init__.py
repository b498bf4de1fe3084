"""togi.workers.ray"""
