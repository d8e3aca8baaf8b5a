"""Routing: from the router's logits to the experts of each token and their weights."""
