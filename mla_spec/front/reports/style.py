"""The style sheet of the HTML report."""

STYLE = """\
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5b6675; --paper: #fff; --card: #f4f6f9; --line: #d8dee6;
  --exact: #dfeee2; --r0: #eaf2fb; --r1: #d0e3f6; --r2: #a9cbee; --r3: #79abe0; --r4: #4a86cc; --deep: #fff;
  --wrong: #c62f2f; --unclear: #f2d48a; --green: #1f7a3a; --yellow: #8a6100; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e9f0; --soft: #9aa6b5; --paper: #14181f; --card: #1d232c; --line: #333c48;
  --exact: #24402c; --r0: #1c2a3a; --r1: #22405f; --r2: #2a5787; --r3: #3570b0; --r4: #5b97dc; --unclear: #6b5416;
  --wrong: #b93a3a; --green: #2c8a49; --yellow: #8a6100; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 1rem; }
p { overflow-wrap: anywhere; }
header { border-bottom: 2px solid var(--line); }
h1 { margin: .5rem 0 0; font-size: 1.7rem; overflow-wrap: anywhere; }
h2 { margin: 2rem 0 .6rem; font-size: 1.2rem; }
h3 { margin: 0 0 .4rem; font-size: 1rem; overflow-wrap: anywhere; }
.badge { padding: .15rem .6rem; border-radius: 1rem; color: #fff; }
.badge.green { background: var(--green); } .badge.red { background: var(--wrong); } .badge.yellow { background: var(--yellow); }
article { margin: 0 0 .8rem; padding: .8rem 1rem; background: var(--card); border-left: 4px solid var(--wrong); border-radius: 4px; }
article p { margin: .1rem 0; }
article ul { margin: .4rem 0; padding-left: 1.2rem; overflow-wrap: anywhere; }
.code, pre { font-family: ui-monospace, monospace; font-size: .82rem; }
.code { margin: .2rem 0; overflow-wrap: anywhere; }
pre { margin: .5rem 0; padding: .5rem .7rem; background: var(--card); border-radius: 4px; white-space: pre-wrap; overflow-wrap: anywhere; }
article pre { background: var(--paper); }
.note { padding: .5rem .8rem; background: var(--unclear); border-radius: 4px; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: separate; border-spacing: 2px; font-size: .85rem; }
th { text-align: left; font-weight: 500; color: var(--soft); padding: .15rem .4rem; vertical-align: bottom; min-width: 6rem; }
th:not(:first-child) { min-width: 0; }
tbody th { color: var(--ink); position: sticky; left: 0; background: var(--paper); vertical-align: middle; }
td { text-align: center; padding: .2rem .45rem; border-radius: 3px; white-space: nowrap; font-variant-numeric: tabular-nums; }
td small { margin-left: .5em; font-size: 1em; opacity: .85; }
.regimes tbody th { min-width: 9rem; max-width: 22rem; line-height: 1.2; }
.regimes thead th:not(:first-child) { height: 8.5rem; }
.regimes thead span { writing-mode: vertical-rl; transform: rotate(180deg); line-height: 1.1; max-height: 8rem; }
.levels td { white-space: normal; font-size: .78rem; }
.dense { border-spacing: 1px; font-size: .7rem; } .dense td { min-width: 1rem; height: 1rem; padding: 0; }
.dense th { padding: 0 .3rem; white-space: nowrap; }
.dense thead th:not(:first-child) span { writing-mode: vertical-rl; }
.spreads { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); gap: 1rem; }
figure { margin: 0; } figcaption { font-size: .78rem; color: var(--soft); } figcaption strong { display: block; color: var(--ink); }
svg { display: block; width: 100%; height: auto; background: var(--card); border-radius: 4px; }
svg .bar { fill: var(--r4); } svg .axis { stroke: var(--soft); fill: none; }
svg .limit { stroke: var(--wrong); stroke-width: 1.5; fill: none; } svg text { font-size: 10px; fill: var(--soft); }
.none { color: var(--soft); } .none::before { content: "·"; }
.exact { background: var(--exact); } .unclear { background: var(--unclear); }
.refuses { background: var(--line); } .pale { opacity: .45; } :where(td.within) { background: var(--r1); }
.wrong { background: var(--wrong); color: #fff; }
.r0 { background: var(--r0); } .r1 { background: var(--r1); } .r2 { background: var(--r2); }
.r3 { background: var(--r3); } .r4 { background: var(--r4); color: var(--deep); }
.legend { font-size: .8rem; color: var(--soft); } .legend span { display: inline-block; margin: .1rem; padding: .1rem .5rem;
  border-radius: 3px; color: var(--ink); } .legend .wrong, .legend .r4 { color: #fff; }
details { margin: .4rem 0; } summary { cursor: pointer; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: minmax(7rem, 14rem) minmax(0, 1fr); gap: .2rem .8rem; margin: .4rem 0; font-size: .9rem; }
dt { color: var(--soft); overflow-wrap: anywhere; } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 40rem) { dl { grid-template-columns: minmax(0, 1fr); } dd { margin: 0 0 .4rem; } h1 { font-size: 1.4rem; }
  td, th { padding: .15rem .25rem; } td small { display: block; margin: 0; }
  .dense th:first-child { white-space: normal; min-width: 4rem; } table { font-size: .78rem; }
  .regimes tbody th { max-width: 9rem; font-size: .75rem; } }
"""
