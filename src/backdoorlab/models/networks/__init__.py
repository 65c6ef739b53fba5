"""Networks that are no classifiers: generators of triggers, encoders of messages, changers of style."""
