"""Networks and samplers that make views; they know no field."""
