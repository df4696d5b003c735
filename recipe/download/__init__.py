"""Model and data sets from the Hugging Face hub: pinned, resumable, and verified file by file.

Usage: python -m recipe.download model --local-dir DIR [--repo REPO] [--revision REV] [--dry-run]
       python -m recipe.download data NAME --local-dir DIR [--revision REV] [--dry-run]
       python -m recipe.download data --repo REPO --local-dir DIR [--revision REV] [--dry-run]
       python -m recipe.download all --base-dir DIR [--dry-run]

A directory holds one repository at one commit. The first download resolves the revision and records the commit in
download.json; whatever is fetched into the directory later is of that commit. When everything is there, download.json
also holds size and SHA-256 of every file (and the rows of a data set), and the same command only compares the files
with them, without network.
"""
