"""Parts of the decomposition of queries and keys that estimators share."""
