"""The operator API: registry, approvals, people, and what operators look at."""
