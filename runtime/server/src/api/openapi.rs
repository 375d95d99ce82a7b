//! The OpenAPI document, made from the types that the handlers read and write, and from the list of errors.

use super::error::{Code, ErrorBody};
use super::types::{
    CreateBody, Deleted, DestroyedRun, ExecAnswer, ExecBody, ForkBody, Forks, History, Listing, PatchBody,
    PoolAnswer, PoolBody, Pools, RestoreBody, Run, Runs, ShellAnswer, ShellAsk, SnapshotMade, Snapshots,
    StreamData, TerminalControl, UsageAnswer, Written,
};
use crate::config::NetworkProfile;
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

/// The document.
pub(crate) fn document() -> Value {
    let mut doc = Doc::default();
    runs(&mut doc);
    commands_and_files(&mut doc);
    clones_and_pools(&mut doc);
    doc.finish()
}

fn runs(doc: &mut Doc) {
    let (create, run, runs) = (doc.of::<CreateBody>(), doc.of::<Run>(), doc.of::<Runs>());
    doc.add("post", "/v1/runs", "Make a sandbox. Idempotency-Key: sent again, it is not made again.")
        .takes(create)
        .gives("201", run.clone());
    doc.add("get", "/v1/runs", "The key's sandboxes, oldest first").gives("200", runs);
    doc.add("get", "/v1/runs/{id}", "One sandbox").gives("200", run.clone());
    let (patch, destroyed) = (doc.of::<PatchBody>(), doc.of::<DestroyedRun>());
    doc.add("patch", "/v1/runs/{id}", "Set the idleness after which it ends").takes(patch).gives("200", run);
    doc.add("delete", "/v1/runs/{id}", "End it; a second time says the same again").gives("200", destroyed);
    let (history, usage) = (doc.of::<History>(), doc.of::<UsageAnswer>());
    doc.add("get", "/v1/runs/history", "Sandboxes that have ended, newest first")
        .query(&["limit", "after"])
        .gives("200", history);
    doc.add("get", "/v1/usage", "What the key's sandboxes have cost").gives("200", usage);
    let profile = doc.of::<NetworkProfile>();
    doc.add("get", "/v1/network-profiles", "Named network policies")
        .gives("200", json!({ "type": "array", "items": profile }));
}

fn commands_and_files(doc: &mut Doc) {
    let (exec, answer, data) = (doc.of::<ExecBody>(), doc.of::<ExecAnswer>(), doc.of::<StreamData>());
    doc.add("post", "/v1/runs/{id}/exec", "Run a command to its end")
        .takes(exec.clone())
        .gives("200", answer);
    doc.add(
        "post",
        "/v1/runs/{id}/exec/stream",
        "Follow a command: events stdout, stderr, exit, error. With Last-Event-ID it goes on where it was.",
    )
    .takes(exec)
    .gives_as("200", "text/event-stream", data);
    let control = doc.of::<TerminalControl>();
    doc.add("get", "/v1/runs/{id}/terminal", "WebSocket: binary frames are bytes, text frames control")
        .query(&["rows", "cols", "command", "token"])
        .gives("101", control);
    let (ask, reply) = (doc.of::<ShellAsk>(), doc.of::<ShellAnswer>());
    doc.add("get", "/v1/runs/{id}/shell", "WebSocket: one bash, a command and an answer at a time")
        .query(&["token"])
        .gives("101", json!({ "oneOf": [ask, reply] }));
    let bytes = json!({ "type": "string", "format": "binary" });
    let (written, listing) = (doc.of::<Written>(), doc.of::<Listing>());
    doc.add("post", "/v1/runs/{id}/files/upload", "Write a file, with its directories")
        .query(&["path"])
        .takes_as("application/octet-stream", bytes.clone())
        .gives("200", written);
    doc.add("get", "/v1/runs/{id}/files/download", "Read a file").query(&["path"]).gives_as(
        "200",
        "application/octet-stream",
        bytes.clone(),
    );
    doc.add("get", "/v1/runs/{id}/files", "List a directory").query(&["path"]).gives("200", listing);
    doc.add("get", "/v1/runs/{id}/proxy/{port}/{path}", "Any method, WebSocket upgrades too: a server in it")
        .gives_as("default", "*/*", bytes);
    doc.add("get", "/v1/runs/{id}/audit", "The audit log's entries about it, one a line").gives_as(
        "200",
        "application/x-ndjson",
        json!({ "type": "object" }),
    );
}

fn clones_and_pools(doc: &mut Doc) {
    let (made, list, deleted) = (doc.of::<SnapshotMade>(), doc.of::<Snapshots>(), doc.of::<Deleted>());
    doc.add("post", "/v1/runs/{id}/snapshot", "Save it; it goes on").gives("201", made);
    doc.add("get", "/v1/snapshots", "The key's snapshots, newest first").gives("200", list);
    doc.add("delete", "/v1/snapshots/{id}", "Delete a snapshot").gives("200", deleted.clone());
    let (restore, run) = (doc.of::<RestoreBody>(), doc.of::<Run>());
    doc.add("post", "/v1/runs/restore", "A new sandbox from a snapshot")
        .takes(restore)
        .gives("201", run.clone());
    let (fork, forks) = (doc.of::<ForkBody>(), doc.of::<Forks>());
    doc.add(
        "post",
        "/v1/runs/{id}/fork",
        "Children with its memory and files. Idempotency-Key as for create.",
    )
    .takes(fork)
    .gives("201", forks);
    doc.add("post", "/v1/runs/{id}/hibernate", "Put it to disk").gives("200", run.clone());
    doc.add("post", "/v1/runs/{id}/resume", "Let it run again").gives("200", run);
    let (body, pool, pools) = (doc.of::<PoolBody>(), doc.of::<PoolAnswer>(), doc.of::<Pools>());
    doc.add("get", "/v1/pools", "Templates kept ready").gives("200", pools);
    doc.add("post", "/v1/pools", "Keep one").takes(body.clone()).gives("201", pool.clone());
    doc.add("get", "/v1/pools/{id}", "One pool").gives("200", pool.clone());
    for path in ["/v1/pools", "/v1/pools/{id}"] {
        doc.add("patch", path, "Change a pool").takes(body.clone()).gives("200", pool.clone());
        doc.add("delete", path, "Keep it no longer").takes(body.clone()).gives("200", deleted.clone());
    }
    doc.add("get", "/v1/status", "What the status page shows").gives("200", json!({ "type": "object" }));
    doc.add("get", "/healthz", "Whether the daemon answers").open().gives("200", json!({ "type": "object" }));
    doc.add("get", "/metrics", "Counts, for Prometheus").open().gives_as(
        "200",
        "application/openmetrics-text",
        json!({ "type": "string" }),
    );
    doc.add("get", "/openapi.json", "This document").open().gives("200", json!({ "type": "object" }));
}

#[derive(Default)]
struct Doc {
    paths: Map<String, Value>,
    schemas: Map<String, Value>,
}

/// One operation on its way.
struct Operation<'d>(&'d mut Value);

impl Doc {
    /// A reference to a type's schema, which is put among the components with all that it refers to.
    fn of<T: ToSchema>(&mut self) -> Value {
        let mut all = Vec::new();
        T::schemas(&mut all);
        all.push((T::name().into_owned(), T::schema()));
        for (name, schema) in all {
            self.schemas.insert(name, serde_json::to_value(schema).unwrap_or_default());
        }
        json!({ "$ref": format!("#/components/schemas/{}", T::name()) })
    }

    fn add(&mut self, method: &str, path: &str, summary: &str) -> Operation<'_> {
        let parameters: Vec<Value> = path
            .split(['{', '}'])
            .skip(1)
            .step_by(2)
            .map(|name| json!({ "name": name, "in": "path", "required": true, "schema": { "type": "string" } }))
            .collect();
        let of_path = self.paths.entry(path.to_owned()).or_insert_with(|| json!({}));
        of_path[method] = json!({
            "summary": summary,
            "operationId": format!("{method} {path}"),
            "parameters": parameters,
            "responses": { "default": { "$ref": "#/components/responses/Error" } },
            "security": [{ "key": [] }],
        });
        Operation(&mut of_path[method])
    }

    fn finish(mut self) -> Value {
        let error = self.of::<ErrorBody>();
        let codes: Vec<&str> = Code::ALL.iter().map(|code| code.name()).collect();
        self.schemas["ErrorBody"]["properties"]["code"]["enum"] = json!(codes);
        let errors: Vec<Value> = Code::ALL
            .iter()
            .map(|code| json!({ "code": code.name(), "status": code.status().as_u16(), "cause": code.cause() }))
            .collect();
        json!({
            "openapi": "3.1.0",
            "info": { "title": "Peregrine", "version": env!("CARGO_PKG_VERSION"), "license": { "name": "Apache-2.0" } },
            "paths": self.paths,
            "components": {
                "schemas": self.schemas,
                "responses": { "Error": {
                    "description": "What went wrong: see x-errors for every code, its status and its cause",
                    "content": { "application/json": { "schema": error } },
                } },
                "securitySchemes": { "key": { "type": "http", "scheme": "bearer" } },
            },
            "x-errors": errors,
        })
    }
}

impl Operation<'_> {
    fn takes(self, schema: Value) -> Self {
        self.takes_as("application/json", schema)
    }

    fn takes_as(self, kind: &str, schema: Value) -> Self {
        self.0["requestBody"] = json!({ "content": { kind: { "schema": schema } } });
        self
    }

    fn query(self, names: &[&str]) -> Self {
        let schema = json!({ "type": "string" });
        let parameters = names.iter().map(|name| json!({ "name": name, "in": "query", "schema": schema }));
        if let Some(list) = self.0["parameters"].as_array_mut() {
            list.extend(parameters);
        }
        self
    }

    fn gives(self, status: &str, schema: Value) {
        self.gives_as(status, "application/json", schema);
    }

    fn gives_as(self, status: &str, kind: &str, schema: Value) {
        self.0["responses"][status] =
            json!({ "description": "Done", "content": { kind: { "schema": schema } } });
    }

    /// No key is asked for.
    fn open(self) -> Self {
        self.0["security"] = json!([]);
        self
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn every_reference_leads_somewhere_and_every_error_is_named() {
        let document = document();
        let text = document.to_string();
        for part in text.split("\"$ref\":\"#").skip(1) {
            let pointer = part.split('"').next().unwrap();
            assert!(document.pointer(pointer).is_some(), "{pointer}");
        }
        let named = document["components"]["schemas"]["ErrorBody"]["properties"]["code"]["enum"].clone();
        assert_eq!(named.as_array().unwrap().len(), Code::ALL.len());
        assert!(
            document["x-errors"].as_array().unwrap().iter().all(|e| !e["cause"].as_str().unwrap().is_empty())
        );
        assert!(document["components"]["schemas"]["Run"]["properties"]["create_ms"].is_object());
    }
}
