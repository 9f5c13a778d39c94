"""Pictures for the documentation: a plotly figure as JSON, drawn by headless Chromium.

    python data/build/graphs.py .simmerge/bench/scale.json docs/images/scale.png

The figures are written by the benches.
"""

import argparse
import json
import shutil
import subprocess
import tempfile
from pathlib import Path

from plotly.offline import get_plotlyjs

SIZE = (860, 480)


def main() -> None:
    """Command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", type=Path)
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    browser = next((found for name in ("chromium", "google-chrome", "chrome") if (found := shutil.which(name))), None)
    if browser is None:
        raise SystemExit("no Chromium in PATH; install the package chromium, then run this again")
    figure = json.loads(options.figure.read_text())
    figure["layout"] = figure.get("layout", {}) | {"width": SIZE[0], "height": SIZE[1]}
    page = (
        '<!doctype html><meta charset="utf-8"><body style="margin:0;background:#fff"><div id="it"></div><script>'
        + get_plotlyjs()
        + f"</script><script>const f={json.dumps(figure)};"
        + "Plotly.newPlot('it', f.data, f.layout, {staticPlot: true});</script>"
    )
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "page.html"
        source.write_text(page)
        command = [browser, "--headless", "--no-sandbox", "--hide-scrollbars", "--virtual-time-budget=4000",
                   f"--window-size={SIZE[0]},{SIZE[1]}", f"--screenshot={options.picture.resolve()}",
                   source.as_uri()]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, timeout=120)
    print(f"{options.picture}: {options.picture.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
