//! Images from registries, as the OCI distribution specification has them: manifest, configuration, layers. Each
//! blob is digested while it arrives and lies in the cache's `blobs` before it is used.

mod auth;
mod blobs;
mod http;

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::manifest::{
    CONFIG_MAX_BYTES, Descriptor, Digest, Document, MANIFEST_MAX_BYTES, Manifest, for_this_platform,
};
use super::reference::{DOCKER_HUB, Reference};
use super::settings::Registries;
use crate::error::Error;
use crate::rootfs::Limits;
use auth::Credentials;
pub(super) use blobs::{download, path as blob_path};
use http::{Answer, Failure, Http};

/// Where Docker Hub's registry really is.
const DOCKER_HUB_HOST: &str = "registry-1.docker.io";
const ACCEPTED: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json";
/// A request that fails in a way that may pass is made so often.
const ATTEMPTS: u32 = 5;
const FIRST_PAUSE: Duration = Duration::from_millis(200);
/// A registry that asks for more patience than this gets none.
const PAUSE_MAX: Duration = Duration::from_secs(30);

/// What a registry has of an image, its layers not yet fetched.
pub(super) struct Remote {
    pub(super) digest: Digest,
    pub(super) manifest: Manifest,
    pub(super) config: Vec<u8>,
}

/// One repository at one registry.
pub(super) struct Repository {
    http: Http,
    /// For messages.
    name: String,
    /// `https://host/v2/repository`.
    url: String,
    repository: String,
    plain_http: bool,
    credentials: Option<Credentials>,
    authorization: Mutex<Option<String>>,
    image: String,
}

impl Repository {
    /// Those that may have the image, in the order in which to ask: mirrors, then the registry itself.
    pub(super) fn all_for(reference: &Reference, registries: &Registries) -> Result<Vec<Self>, Error> {
        let mirrors = registries.mirrors.get(reference.registry()).into_iter().flatten();
        let hosts = mirrors.map(String::as_str).chain([reference.registry()]);
        hosts.map(|host| Self::new(host, reference, registries)).collect()
    }

    fn new(registry: &str, reference: &Reference, registries: &Registries) -> Result<Self, Error> {
        let image = reference.familiar();
        let plain_http =
            http::is_loopback(registry) || registries.plain_http.iter().any(|name| name == registry);
        let scheme = if plain_http { "http" } else { "https" };
        let host = if registry == DOCKER_HUB { DOCKER_HUB_HOST } else { registry };
        let repository = reference.repository().to_owned();
        let credentials = auth::credentials(registry)
            .map_err(|why| Error::Setting { name: "credentials".to_owned(), why })?;
        Ok(Self {
            http: Http::new(),
            name: registry.to_owned(),
            url: format!("{scheme}://{host}/v2/{repository}"),
            repository,
            plain_http,
            credentials,
            authorization: Mutex::new(None),
            image,
        })
    }

    /// The image's digest, without fetching more than its manifest.
    pub(super) fn manifest(&self, reference: &Reference) -> Result<(Digest, Manifest), Error> {
        let version = reference.digest().or(reference.tag()).unwrap_or("latest");
        let (digest, bytes) = self.document(version)?;
        self.platform(digest, &bytes, 0)
    }

    /// What is left of the image's description.
    pub(super) fn config(&self, digest: Digest, manifest: Manifest) -> Result<Remote, Error> {
        let total: u64 = manifest.layers.iter().map(|layer| layer.size).fold(0, u64::saturating_add);
        let most_bytes = Limits::default().bytes;
        if total > most_bytes {
            return Err(self.bad(format!(
                "its layers have {total} bytes, more than the {most_bytes} that an image may"
            )));
        }
        let wanted = &manifest.config;
        if wanted.size > CONFIG_MAX_BYTES {
            return Err(self
                .bad(format!("its configuration has {} bytes, more than {CONFIG_MAX_BYTES}", wanted.size)));
        }
        let url = format!("{}/blobs/{}", self.url, wanted.digest);
        let config = self.small(&url, &[], CONFIG_MAX_BYTES).map_err(|failure| self.error(failure))?.1;
        if Digest::of(&config) != wanted.digest {
            return Err(
                self.broken(format!("sends a configuration that has not the digest {}", wanted.digest))
            );
        }
        Ok(Remote { digest, manifest, config })
    }

    /// Follows an index to the manifest for this machine.
    fn platform(&self, digest: Digest, bytes: &[u8], depth: u32) -> Result<(Digest, Manifest), Error> {
        match Document::parse(bytes).map_err(|why| self.bad(why))? {
            Document::Manifest(manifest) => Ok((digest, manifest)),
            Document::Index(_) if depth > 1 => {
                Err(self.bad("its indexes lead to indexes without end".to_owned()))
            }
            Document::Index(manifests) => {
                let chosen = for_this_platform(&manifests).map_err(|why| self.bad(why))?;
                let (digest, bytes) = self.document(chosen.digest.as_str())?;
                self.platform(digest, &bytes, depth + 1)
            }
        }
    }

    /// A manifest or index by tag or digest.
    fn document(&self, version: &str) -> Result<(Digest, Vec<u8>), Error> {
        let url = format!("{}/manifests/{version}", self.url);
        let (said, bytes) = self
            .small(&url, &[("accept", ACCEPTED)], MANIFEST_MAX_BYTES)
            .map_err(|failure| self.error(failure))?;
        let digest = Digest::of(&bytes);
        let asked = Digest::parse(version);
        let said = said.as_deref().and_then(Digest::parse);
        if [asked, said].into_iter().flatten().any(|wanted| wanted != digest) {
            return Err(self.broken(format!("sends a manifest that has not the digest it should ({digest})")));
        }
        Ok((digest, bytes))
    }

    /// A small answer and the digest that the registry says it has.
    fn small(
        &self,
        url: &str,
        headers: &[(&str, &str)],
        most_bytes: u64,
    ) -> Result<(Option<String>, Vec<u8>), Failure> {
        self.with_attempts(|| {
            let answer = self.get(url, headers)?;
            let said = answer.header("docker-content-digest").map(str::to_owned);
            Ok((said, answer.bytes(most_bytes)?))
        })
    }

    /// Repeats what fails in a way that may pass.
    fn with_attempts<T>(&self, mut attempt: impl FnMut() -> Result<T, Failure>) -> Result<T, Failure> {
        let mut pause = FIRST_PAUSE;
        for _ in 1..ATTEMPTS {
            match attempt() {
                Err(failure) if failure.may_pass() => std::thread::sleep(patience(&failure, pause)?),
                result => return result,
            }
            pause *= 2;
        }
        attempt()
    }

    /// One request, with a token if the registry asks for one.
    fn get(&self, url: &str, headers: &[(&str, &str)]) -> Result<Answer, Failure> {
        let known = self.authorization.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let challenge = match self.http.get(url, headers, known.as_deref()) {
            Err(Failure::Status { status: 401, challenge: Some(challenge), .. }) => challenge,
            result => return result,
        };
        let authorization = auth::answer(
            &self.http,
            &challenge,
            &self.repository,
            self.credentials.as_ref(),
            self.plain_http,
        )?;
        let answer = self.http.get(url, headers, authorization.as_deref());
        *self.authorization.lock().unwrap_or_else(PoisonError::into_inner) = authorization;
        answer
    }

    fn bad(&self, why: String) -> Error {
        Error::BadContent { image: self.image.clone(), why }
    }

    fn broken(&self, what: String) -> Error {
        Error::Registry { image: self.image.clone(), why: format!("registry {} {what}", self.name) }
    }

    /// What a failure means to whoever wants the image.
    fn error(&self, failure: Failure) -> Error {
        let (image, name) = (self.image.clone(), &self.name);
        match failure {
            Failure::Status { status: 404, .. } => {
                Error::ImageNotFound { image, why: format!("registry {name} does not have it") }
            }
            Failure::Status { status: status @ (401 | 403), text, .. } => {
                let said = if text.is_empty() { String::new() } else { format!(" ({text})") };
                let why = match self.credentials {
                    Some(_) => {
                        format!("registry {name} refuses the credentials in Docker's config.json{said}")
                    }
                    None => format!(
                        "registry {name} does not have it or wants a login{said}; `docker login {name}` leaves one \
                         where it is looked for"
                    ),
                };
                Error::ImageRefused { image, status, why }
            }
            failure => Error::Registry { image, why: format!("registry {name}: {failure}") },
        }
    }
}

/// How long to wait before another attempt; the failure itself if the registry wants too long.
fn patience(failure: &Failure, pause: Duration) -> Result<Duration, Failure> {
    match failure {
        Failure::Status { status, text, retry_after: Some(wanted), .. } if *wanted > PAUSE_MAX => {
            Err(Failure::Status {
                status: *status,
                text: format!("{text} (and asks to come back in {} s)", wanted.as_secs()),
                challenge: None,
                retry_after: None,
            })
        }
        Failure::Status { retry_after: Some(wanted), .. } => Ok((*wanted).max(pause)),
        _ => Ok(pause),
    }
}

/// Blobs of an image, configuration aside.
pub(super) fn unique_layers(manifest: &Manifest) -> Vec<&Descriptor> {
    let mut layers: Vec<&Descriptor> = manifest.layers.iter().collect();
    layers.sort_by(|a, b| a.digest.cmp(&b.digest));
    layers.dedup_by(|a, b| a.digest == b.digest);
    layers
}
