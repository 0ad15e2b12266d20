"""Staying up, and talking to servers that fail: RabbitMQ, Redis, and the policies around them."""
