"use strict";
// Shows openapi.json. Everything from the document becomes text, never markup.

function node(name, attributes, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) made.setAttribute(key, value);
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const code = (text) => node("code", {}, text);

function resolve(spec, value) {
  if (!value || !value.$ref) return value;
  return value.$ref.slice(2).split("/").reduce((found, part) => found[part], spec);
}

function typeOf(schema) {
  if (!schema) return "";
  if (schema.$ref) {
    const name = schema.$ref.split("/").pop();
    return node("a", { href: "#schema-" + name }, name);
  }
  const choice = schema.anyOf || schema.oneOf;
  if (choice && !schema.type) return join(choice.map(typeOf), " | ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((item) => JSON.stringify(item)).join(" | ");
  if (schema.type === "array") return join(["list of ", typeOf(schema.items || {}) || "any"], "");
  if (schema.additionalProperties && schema.additionalProperties !== true) {
    return join(["map of ", typeOf(schema.additionalProperties) || "any"], "");
  }
  return [schema.type || "any", schema.format].filter(Boolean).join(", ");
}

function join(parts, separator) {
  const made = node("span");
  parts.forEach((part, index) => made.append(...(index ? [separator, part] : [part])));
  return made;
}

function limits(schema) {
  const names = ["minLength", "maxLength", "minimum", "maximum", "minItems", "maxItems", "maxProperties", "pattern", "default"];
  return names
    .filter((name) => schema[name] !== undefined && schema[name] !== null)
    .map((name) => name + " " + JSON.stringify(schema[name]))
    .join(", ");
}

function table(heads, rows) {
  const head = node("tr", {}, ...heads.map((text) => node("th", {}, text)));
  const body = rows.map((cells) => node("tr", {}, ...cells.map((cell) => node("td", {}, cell))));
  return node("div", { class: "scroll" }, node("table", {}, head, ...body));
}

function section(title, rows, heads) {
  return rows.length ? node("div", {}, node("h4", {}, title), table(heads, rows)) : null;
}

function media(content) {
  return Object.entries(content || {}).map(([type, held]) => [code(type), typeOf(held.schema)]);
}

function callOf(spec, path, method, call) {
  const summary = node(
    "summary",
    {},
    node("span", { class: "method" }, method.toUpperCase()),
    " ",
    code(path),
    " — " + (call.summary || "")
  );
  const parameters = (call.parameters || []).map((given) => {
    const parameter = resolve(spec, given);
    const about = parameter.description + (parameter.required ? " (required)" : "");
    return [code(parameter.name), parameter.in, typeOf(parameter.schema), join([about, limits(parameter.schema)], " ")];
  });
  const answers = Object.entries(call.responses).flatMap(([status, given]) => {
    const answer = resolve(spec, given);
    const kinds = media(answer.content);
    const held = kinds.length ? join(kinds.map((pair) => join(pair, " ")), "; ") : "";
    const headers = Object.keys(answer.headers || {}).filter((name) => !answer.headers[name].$ref).join(", ");
    return [[code(status), answer.description, held, headers]];
  });
  return node(
    "details",
    { id: call.operationId },
    summary,
    call.description ? node("p", {}, call.description) : null,
    node("p", { class: "note" }, call["x-permission"] ? "needs " + call["x-permission"] : "open: needs no credential"),
    section("Parameters", parameters, ["name", "in", "type", "about"]),
    section("Body", media((call.requestBody || {}).content), ["media type", "schema"]),
    section("Answers", answers, ["status", "meaning", "body", "headers"])
  );
}

function schemaOf(name, schema) {
  const required = new Set(schema.required || []);
  const rows = Object.entries(schema.properties || {}).map(([field, held]) => [
    code(field + (required.has(field) ? " *" : "")),
    typeOf(held),
    join([held.description || "", limits(held)], " "),
  ]);
  return node(
    "details",
    { id: "schema-" + name },
    node("summary", {}, code(name)),
    schema.description ? node("p", {}, schema.description) : null,
    rows.length ? table(["field (* required)", "type", "about"], rows) : node("p", {}, typeOf(schema))
  );
}

function openTarget() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (target && target.tagName === "DETAILS") {
    target.open = true;
    target.scrollIntoView();
  }
}

function show(spec) {
  document.title = spec.info.title;
  document.getElementById("title").textContent = spec.info.title + " " + spec.info.version;
  document.getElementById("about").textContent = spec.info.description;
  const groups = new Map((spec.tags || []).map((tag) => [tag.name, []]));
  for (const [path, methods] of Object.entries(spec.paths)) {
    for (const [method, call] of Object.entries(methods)) {
      const tag = (call.tags || ["other"])[0];
      if (!groups.has(tag)) groups.set(tag, []);
      groups.get(tag).push(callOf(spec, path, method, call));
    }
  }
  const calls = document.getElementById("calls");
  calls.replaceChildren();
  for (const [tag, made] of groups) calls.append(node("section", {}, node("h2", {}, tag), ...made));
  const schemas = Object.entries(spec.components.schemas).map(([name, schema]) => schemaOf(name, schema));
  document.getElementById("schemas").replaceChildren(...schemas);
  document.getElementById("filter").addEventListener("input", (event) => {
    const wanted = event.target.value.toLowerCase();
    for (const row of document.querySelectorAll("details")) row.hidden = !row.textContent.toLowerCase().includes(wanted);
  });
  window.addEventListener("hashchange", openTarget);
  openTarget();
}

fetch("/openapi.json")
  .then((answer) => (answer.ok ? answer.json() : Promise.reject(new Error("status " + answer.status))))
  .then(show)
  .catch((error) => {
    document.getElementById("calls").textContent = "openapi.json could not be read: " + error.message;
  });
