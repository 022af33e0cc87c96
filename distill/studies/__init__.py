"""Demonstrations and experiments on the bundled toy world, whose results the docs show. Nothing else imports them."""
