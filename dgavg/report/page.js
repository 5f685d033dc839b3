// One table at a time where a page has those of several rules; without this all are shown.
for (const group of document.querySelectorAll(".tables")) {
  const rules = [...group.querySelectorAll(".rule")];
  if (rules.length < 2) continue;
  const tabs = document.createElement("div");
  tabs.className = "tabs";
  tabs.setAttribute("role", "group");
  tabs.setAttribute("aria-label", "selection rule");
  const buttons = rules.map((rule) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = rule.dataset.rule;
    button.addEventListener("click", () => show(rule));
    tabs.append(button);
    return button;
  });
  const show = (chosen) => rules.forEach((rule, i) => {
    rule.hidden = rule !== chosen;
    buttons[i].setAttribute("aria-pressed", String(rule === chosen));
  });
  rules[0].before(tabs);
  show(rules[0]);
}
