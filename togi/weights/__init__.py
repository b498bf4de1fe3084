"""The way of a weight: model files, names and buckets, carriers, and what an engine does with an update."""
