"""The scores of `CircuitScorer`, group by group, for one model or one stack of heads at a time."""
