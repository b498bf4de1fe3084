"""What a policy acts in: environments, agents, their tools, and the tokens of an episode."""
