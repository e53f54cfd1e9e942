"""What a reader of the layer may skip: checks, the readers of state dicts, op schemas, the prepared form."""
