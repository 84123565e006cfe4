"Writes README.md from nbs/index.ipynb as it is stored: no cell is run."
import json
import re
from pathlib import Path

root = Path(__file__).parent.parent


def shown(cell):
    "The Markdown of one cell."
    source = ''.join(cell['source'])
    if cell['cell_type'] == 'markdown': return source
    outputs = [''.join(output['data']['text/markdown']) for output in cell['outputs'] if 'text/markdown' in output.get('data', {})]
    if re.match(r'#\|\s*hide', source): return ''
    if re.match(r'#\|\s*echo: false', source): return '\n\n'.join(outputs)
    return '\n\n'.join([f'```python\n{source}\n```', *outputs])


def readme():
    "The whole README."
    cells = json.loads((root/'nbs/index.ipynb').read_text(encoding='utf-8'))['cells']
    text = '\n\n'.join(filter(None, map(shown, cells))).replace('](../figures/', '](figures/')
    return f'<!-- written by .ci/readme.py from nbs/index.ipynb -->\n\n{text}\n'


if __name__ == '__main__': (root/'README.md').write_text(readme(), encoding='utf-8')
