"Package metadata is read from settings.ini, which nbdev reads too."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(here/'settings.ini', encoding='utf-8')
settings = config['DEFAULT']

setup(
    name=settings['lib_name'], version=settings['version'], description=settings['description'],
    keywords=settings['keywords'], author=settings['author'], author_email=settings['author_email'],
    url=settings['git_url'], license='Apache-2.0', zip_safe=False,
    packages=find_packages(include=[settings['lib_path'], f"{settings['lib_path']}.*"]),
    python_requires=f">={settings['min_python']}", install_requires=settings['requirements'].split(),
    extras_require={'dev': settings['dev_requirements'].split()},
    long_description=(here/'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    entry_points={'nbdev': [f"{settings['lib_path']}={settings['lib_path']}._modidx:d"],
                  'console_scripts': settings['console_scripts'].split()},
)
