"""togi.rollout"""
