"""Pure torch functions on stacks of head matrices; no state, no files, no estimators."""
