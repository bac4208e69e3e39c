"""Parts of the estimator of operations: token pairs, and the scores of one model."""
