"""Does the project keep its own rules: imports, pages, notebooks, the steps of CONTRIBUTING?"""
