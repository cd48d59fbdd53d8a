"""Images, videos and sounds of strangers: fetched, checked, and decoded at arm's length."""
