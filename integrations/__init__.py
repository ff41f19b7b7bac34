"""Adapters that other frameworks need before they take a backbone; most frameworks need none (docs/ecosystem.md).

Each module imports its framework at first use, so `import terrazzo` imports none of them.
"""
