//! Who this machine is to a registry: Docker's credentials, and the tokens bought with them. Docker's formats:
//! `config.json` of its command, and the distribution project's "Token Authentication Specification".

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use super::http::{Failure, Http};

const TOKEN_MAX_BYTES: u64 = 1 << 20;
/// Under which Docker keeps the credentials for Docker Hub.
const DOCKER_HUB_KEY: &str = "https://index.docker.io/v1/";

/// What a user has for a registry.
#[derive(Clone, PartialEq, Eq)]
pub(super) enum Credentials {
    Password {
        user: String,
        password: String,
    },
    /// Of OAuth 2, to be exchanged.
    IdentityToken(String),
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct DockerConfig {
    auths: BTreeMap<String, DockerAuth>,
    creds_store: Option<String>,
    cred_helpers: BTreeMap<String, String>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct DockerAuth {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    identitytoken: Option<String>,
}

/// What a credential helper prints.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Helped {
    username: String,
    secret: String,
}

/// The credentials for a registry: `$DOCKER_CONFIG/config.json`, else `~/.docker/config.json`. None is no error, and
/// a file that cannot be read is only that.
pub(super) fn credentials(registry: &str) -> Result<Option<Credentials>, String> {
    let dir = std::env::var_os("DOCKER_CONFIG").filter(|dir| !dir.is_empty()).map(PathBuf::from);
    let dir = dir.or_else(|| std::env::home_dir().map(|home| home.join(".docker")));
    let Some(path) = dir.map(|dir| dir.join("config.json")) else { return Ok(None) };
    let text = match std::fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(format!("cannot read {}: {error}", path.display())),
    };
    let config: DockerConfig =
        serde_json::from_slice(&text).map_err(|error| format!("cannot read {}: {error}", path.display()))?;
    config.credentials(registry)
}

impl DockerConfig {
    fn credentials(&self, registry: &str) -> Result<Option<Credentials>, String> {
        let key = if registry == super::DOCKER_HUB { DOCKER_HUB_KEY } else { registry };
        let same = |name: &str| {
            let host = name.strip_prefix("https://").or(name.strip_prefix("http://")).unwrap_or(name);
            name == key || host.split('/').next() == Some(registry)
        };
        let helper = self.cred_helpers.iter().find(|(name, _)| same(name)).map(|(_, helper)| helper);
        if let Some(helper) = helper.or(self.creds_store.as_ref()) {
            return ask_helper(helper, key);
        }
        let Some((_, auth)) = self.auths.iter().find(|(name, _)| same(name)) else { return Ok(None) };
        auth.credentials()
            .map_err(|why| format!("the credentials for {registry} in Docker's config.json {why}"))
    }
}

impl DockerAuth {
    fn credentials(&self) -> Result<Option<Credentials>, &'static str> {
        if let Some(token) = self.identitytoken.as_ref().filter(|token| !token.is_empty()) {
            return Ok(Some(Credentials::IdentityToken(token.clone())));
        }
        if let (Some(user), Some(password)) = (&self.username, &self.password) {
            return Ok(Some(Credentials::Password { user: user.clone(), password: password.clone() }));
        }
        let Some(auth) = self.auth.as_ref().filter(|auth| !auth.is_empty()) else { return Ok(None) };
        let text = STANDARD.decode(auth.trim()).map_err(|_| "are not base64")?;
        let text = String::from_utf8(text).map_err(|_| "are not UTF-8")?;
        let (user, password) = text.split_once(':').ok_or("have no colon")?;
        let password = password.trim_end_matches('\0').to_owned();
        Ok(Some(Credentials::Password { user: user.to_owned(), password }))
    }
}

/// `docker-credential-HELPER get`, the registry on its standard input.
fn ask_helper(helper: &str, key: &str) -> Result<Option<Credentials>, String> {
    if helper.contains('/') {
        return Err(format!("Docker's config.json names the credential helper {helper:?}, which is no name"));
    }
    let program = format!("docker-credential-{helper}");
    let run = || {
        let mut child =
            Command::new(&program).arg("get").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            std::io::Write::write_all(&mut stdin, key.as_bytes())?;
        }
        child.wait_with_output()
    };
    let output = run().map_err(|error| format!("cannot run {program}: {error}"))?;
    // It fails for a registry that it has nothing for.
    if !output.status.success() {
        return Ok(None);
    }
    let helped: Helped = serde_json::from_slice(&output.stdout)
        .map_err(|_| format!("{program} does not answer as it should"))?;
    Ok(Some(match helped.username.as_str() {
        "<token>" => Credentials::IdentityToken(helped.secret),
        _ => Credentials::Password { user: helped.username, password: helped.secret },
    }))
}

fn basic(user: &str, password: &str) -> String {
    format!("Basic {}", STANDARD.encode(format!("{user}:{password}")))
}

/// The `Authorization` that answers a registry's challenge; `None` if there is nothing to answer with.
pub(super) fn answer(
    http: &Http,
    challenge: &str,
    repository: &str,
    credentials: Option<&Credentials>,
    plain_http: bool,
) -> Result<Option<String>, Failure> {
    let (scheme, parameters) = challenge.split_once(' ').unwrap_or((challenge, ""));
    if scheme.eq_ignore_ascii_case("basic") {
        return Ok(match credentials {
            Some(Credentials::Password { user, password }) => Some(basic(user, password)),
            _ => None,
        });
    }
    if !scheme.eq_ignore_ascii_case("bearer") {
        return Err(Failure::Wrong(format!("it wants authentication by {scheme:?}")));
    }
    let parameters = parameters_of(parameters);
    let get =
        |name: &str| parameters.iter().find(|(key, _)| key == name).map_or("", |(_, value)| value.as_str());
    let (realm, service) = (get("realm"), get("service"));
    // Credentials go where the registry says; in the clear only where the registry itself is.
    let safe = realm.starts_with("https://") || (plain_http && realm.starts_with("http://"));
    if !safe {
        return Err(Failure::Wrong(format!("it sends to {realm:?} for a token")));
    }
    let scope = format!("repository:{repository}:pull");
    let answer = match credentials {
        Some(Credentials::IdentityToken(token)) => http.post(
            realm,
            &[
                ("grant_type", "refresh_token"),
                ("refresh_token", token),
                ("service", service),
                ("scope", &scope),
                ("client_id", "peregrine"),
            ],
        )?,
        other => {
            let authorization = match other {
                Some(Credentials::Password { user, password }) => Some(basic(user, password)),
                _ => None,
            };
            let joint = if realm.contains('?') { '&' } else { '?' };
            let url = format!("{realm}{joint}service={}&scope={}", escaped(service), escaped(&scope));
            http.get(&url, &[], authorization.as_deref())?
        }
    };
    let answer: serde_json::Value =
        serde_json::from_slice(&answer.bytes(TOKEN_MAX_BYTES)?).unwrap_or_default();
    let token = answer["token"].as_str().or(answer["access_token"].as_str());
    let token = token.ok_or_else(|| Failure::Wrong("its token service gives no token".to_owned()))?;
    if !token.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(Failure::Wrong("its token service gives a token that is none".to_owned()));
    }
    Ok(Some(format!("Bearer {token}")))
}

/// `key="value",key=value`.
fn parameters_of(mut text: &str) -> Vec<(String, String)> {
    let mut all = Vec::new();
    while let Some((key, rest)) = text.split_once('=') {
        let (value, after) = match rest.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"').unwrap_or((quoted, "")),
            None => rest.split_at(rest.find(',').unwrap_or(rest.len())),
        };
        all.push((key.trim().to_ascii_lowercase(), value.to_owned()));
        text = after.trim_start().trim_start_matches(',').trim_start();
    }
    all
}

/// For a query: everything but letters, digits and a few is percent-encoded (RFC 3986, section 2.3).
fn escaped(text: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._~:/".contains(&b);
    text.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_challenge_is_taken_apart_whatever_its_quotes_hold() {
        let text =
            r#"realm="https://auth.x/token?a=b,c",service=registry.x, scope="repository:a/b:pull,push""#;
        let wanted = [
            ("realm", "https://auth.x/token?a=b,c"),
            ("service", "registry.x"),
            ("scope", "repository:a/b:pull,push"),
        ];
        let found = parameters_of(text);
        assert_eq!(found.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect::<Vec<_>>(), wanted);
        assert!(parameters_of("").is_empty());
        assert_eq!(parameters_of("a=\"open").len(), 1);
        assert_eq!(escaped("a b&c=d"), "a%20b%26c%3Dd");
    }

    #[test]
    fn dockers_credentials_are_found_by_host() {
        let auth = STANDARD.encode("me:pass:word");
        let text = format!(
            r#"{{"auths": {{"https://index.docker.io/v1/": {{"auth": "{auth}"}}, "https://reg.x:5000": {{"username": "u", "password": "p"}},
                "ghcr.io": {{"identitytoken": "t"}}, "empty.x": {{}}, "bad.x": {{"auth": "!"}}}}, "other": 1}}"#
        );
        let config: DockerConfig = serde_json::from_str(&text).unwrap();
        let password = |user: &str, password: &str| {
            Some(Credentials::Password { user: user.to_owned(), password: password.to_owned() })
        };
        assert!(config.credentials("docker.io").unwrap() == password("me", "pass:word"));
        assert!(config.credentials("reg.x:5000").unwrap() == password("u", "p"));
        assert!(config.credentials("ghcr.io").unwrap() == Some(Credentials::IdentityToken("t".to_owned())));
        assert!(config.credentials("reg.x").unwrap().is_none());
        assert!(config.credentials("empty.x").unwrap().is_none());
        assert!(config.credentials("bad.x").is_err());
    }
}
