"""What was measured, as one page: points, profiles, evaluations in; HTML, CSV, Markdown out."""
