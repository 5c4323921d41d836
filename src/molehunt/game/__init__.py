"""The game: submissions, seals, rules, points and ranks. The truth lives here, and no defense imports it."""
