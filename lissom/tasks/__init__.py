"""What a model is for: data in three splits, loss, quality metric, input shape."""
