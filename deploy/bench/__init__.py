"""`riskfleet bench`: what a fleet carries, what an event costs, and whether each was decided once."""
