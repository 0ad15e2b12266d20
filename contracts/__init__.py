"""The only language that the rooms of riskfleet share.

Everything here is pure: values, tables and Protocols. Nothing reads a clock, an environment or a
socket, and nothing here imports another room.
"""
