"""What a run says to people: the answer in a sentence, an HTML page, and the model card of an artifact."""
