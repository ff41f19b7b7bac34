"""What all tests share: the option that stores what the capability tests find."""


def pytest_addoption(parser):
    parser.addoption(
        "--write-capabilities",
        action="store_true",
        help="store what the capability tests find in model_cards/results/capabilities.csv, rather than compare",
    )
