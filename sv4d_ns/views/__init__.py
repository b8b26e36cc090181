"""The grid of views: the contract between synthesis and fitting, and what is estimated from it."""
