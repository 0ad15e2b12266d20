"""A package, since another distribution brings one of the same name, which would come first."""
