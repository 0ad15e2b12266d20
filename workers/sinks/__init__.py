"""The sinks: audit and dead letters into PostgreSQL, metrics into Prometheus."""
