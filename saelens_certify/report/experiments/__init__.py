"""One picture for each experiment."""
