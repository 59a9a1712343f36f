"""Classic control on Gymnasium: the small worlds in which the shared policy-gradient core is proven."""
