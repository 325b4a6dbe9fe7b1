"""The web page: generate images, train, look at data, and compare models in a browser.

`places` decides which files the page may touch, `jobs` is its queue of work, `server` serves it on loopback, and each
tab is one module.
"""
