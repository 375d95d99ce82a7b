//! Pulling: from a real registry, and from one that fails in every way it can.

use super::{command, peregrine_in, stdout_of, text};
use peregrine_image::oci::{self, Pull, Reference, Registries};
use peregrine_image::{Error, Silent, Store};
use std::path::Path;
use tests::oci::{Compression, Layer, Layout, compress, digest};
use tests::registry::{FailingRegistry, Faults, Registry};

/// Incompressible, so that cuts fall where they should.
fn noise(bytes: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..bytes).map(|_| next()).collect()
}

/// An image of three layers, one of each compression; gives the manifest's digest.
fn write_image(layout: &Layout, tag: &str) -> String {
    let layers = [
        layout.layer(&Layer::new().file("one", &noise(300_000)).tar(), Compression::Gzip),
        layout.layer(&Layer::new().file("two", &noise(200_000)).tar(), Compression::Zstd),
        layout.layer(&Layer::new().file("three", b"3").tar(), Compression::Plain),
    ];
    layout.image(tag, &serde_json::json!({ "Env": ["A=1"], "Cmd": ["/x"] }), &layers)
}

fn pull(cache: &Path, name: &str, registries: &Registries) -> Result<oci::ReadyImage, Error> {
    let store = Store::at(cache).unwrap();
    let reference = registries.parse(name)?;
    oci::resolve(&store, &reference, Pull::Missing, registries, &mut Silent)
}

#[test]
fn a_real_registry_is_pulled_from_listed_and_cleaned_up_after() {
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout::new(&dir.path().join("layout"));
    let wanted = write_image(&layout, "v1");
    let registry = Registry::start(None);
    registry.push(&layout, "v1", "some/app:v1", &[]);
    let cache = dir.path().join("cache");
    let name = format!("{}/some/app:v1", registry.host());

    let pulled = peregrine_in(&cache, &["image", "pull", &name, "--json"]);
    let pulled: serde_json::Value = serde_json::from_str(&stdout_of(&pulled)).unwrap();
    assert_eq!(pulled["digest"], wanted.as_str());
    // The same by digest, and without the registry in the name.
    let by_digest = format!("{}/some/app@{wanted}", registry.host());
    let inspected = stdout_of(&peregrine_in(&cache, &["image", "inspect", &by_digest, "--json"]));
    assert!(inspected.contains("\"A=1\""), "{inspected}");
    let defaulted = command(&cache, &["image", "pull", "some/app:v1"])
        .env("PEREGRINE_DEFAULT_REGISTRY", registry.host())
        .output()
        .unwrap();
    assert!(stdout_of(&defaulted).contains(&wanted));
    // Through a mirror of Docker Hub, which is what a name without a registry means.
    registry.push(&layout, "v1", "library/app:v1", &[]);
    let mirrored = command(&cache, &["image", "pull", "app:v1"])
        .env("PEREGRINE_REGISTRY_MIRRORS", format!("docker.io={}", registry.host()))
        .output()
        .unwrap();
    assert!(stdout_of(&mirrored).starts_with("app:v1 sha256:"), "{}", text(&mirrored.stderr));

    for (name, status) in [("some/app:v2", "does not have it"), ("other/app:v1", "does not have it")] {
        let output = peregrine_in(&cache, &["image", "pull", &format!("{}/{name}", registry.host())]);
        assert_eq!(output.status.code(), Some(125));
        assert!(
            text(&output.stderr).contains(status) && text(&output.stderr).contains(name),
            "{}",
            text(&output.stderr)
        );
    }

    stdout_of(&peregrine_in(&cache, &["image", "rm", &name]));
    let kept = stdout_of(&peregrine_in(&cache, &["image", "gc", "--json"]));
    assert!(kept.contains("\"images\":0"), "the other name still holds it: {kept}");
    stdout_of(&peregrine_in(&cache, &["image", "rm", "app:v1"]));
    let collected = stdout_of(&peregrine_in(&cache, &["image", "gc", "--json"]));
    let collected: serde_json::Value = serde_json::from_str(&collected).unwrap();
    assert_eq!((&collected["images"], &collected["blobs"]), (&1.into(), &3.into()), "{collected}");
}

#[test]
fn a_registry_with_passwords_gives_to_those_who_have_them() {
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout::new(&dir.path().join("layout"));
    write_image(&layout, "v1");
    // bcrypt of `secret`, cost 4.
    let registry = Registry::start(Some("me:$2y$04$Wz3zZfSnSCwkqYlXBXz2Quh.ZuTYZ81F5OCFU1yptXwdUGlCKMRWS\n"));
    let cache = dir.path().join("cache");
    let name = format!("{}/private/app:v1", registry.host());
    let output =
        command(&cache, &["image", "pull", &name]).env("DOCKER_CONFIG", dir.path()).output().unwrap();
    assert_eq!(output.status.code(), Some(125));
    assert!(text(&output.stderr).contains("docker login"), "{}", text(&output.stderr));
    registry.push(&layout, "v1", "private/app:v1", &["--dest-creds", "me:secret"]);
    // Base64 of me:secret.
    let config = format!(r#"{{"auths":{{"{}":{{"auth":"bWU6c2VjcmV0"}}}}}}"#, registry.host());
    std::fs::write(dir.path().join("config.json"), config).unwrap();
    let output =
        command(&cache, &["image", "pull", &name]).env("DOCKER_CONFIG", dir.path()).output().unwrap();
    stdout_of(&output);
}

#[test]
fn tokens_are_bought_with_dockers_credentials_and_refusals_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout::new(&dir.path().join("layout"));
    write_image(&layout, "v1");
    let faults = Faults { token: Some("a-token".to_owned()), ..Faults::default() };
    let registry = FailingRegistry::start(&layout, faults);
    let cache = dir.path().join("cache");
    let name = format!("{}/app:v1", registry.host());
    let with_config = |auths: &str| {
        std::fs::write(dir.path().join("config.json"), format!(r#"{{"auths":{{{auths}}}}}"#)).unwrap();
        command(&cache, &["image", "pull", &name]).env("DOCKER_CONFIG", dir.path()).output().unwrap()
    };
    let refused = with_config("");
    assert!(text(&refused.stderr).contains("login"), "{}", text(&refused.stderr));
    let refused = with_config(&format!(r#""{}":{{"auth":"bWU6d3Jvbmc="}}"#, registry.host()));
    assert!(text(&refused.stderr).contains("refuses the credentials"), "{}", text(&refused.stderr));
    let given = with_config(&format!(r#""{}":{{"auth":"bWU6c2VjcmV0"}}"#, registry.host()));
    stdout_of(&given);
}

#[test]
fn a_download_that_breaks_off_goes_on_where_it_stopped() {
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout::new(&dir.path().join("layout"));
    let wanted = write_image(&layout, "v1");
    for no_ranges in [false, true] {
        let faults = Faults { cut_after_bytes: Some(1000), unavailable: 2, no_ranges, ..Faults::default() };
        let registry = FailingRegistry::start(&layout, faults);
        let cache = dir.path().join(format!("cache-{no_ranges}"));
        let image = pull(&cache, &format!("{}/app:v1", registry.host()), &Registries::default()).unwrap();
        assert_eq!(image.digest, wanted);
        let resumed = registry.requests().iter().filter(|(_, range)| range == "bytes=1000-").count();
        // Three layers; the configuration is asked for whole.
        assert!(resumed >= 2, "{:?}", registry.requests());
    }
}

#[test]
fn what_an_earlier_process_left_is_gone_on_with_and_replaced_where_it_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout::new(&dir.path().join("layout"));
    let wanted = write_image(&layout, "v1");
    let layer = compress(&Layer::new().file("one", &noise(300_000)).tar(), Compression::Gzip);
    let mut damaged = layer[..5000].to_vec();
    damaged[100] ^= 1;
    for (case, left, asked) in [("sound", &layer[..5000], 1), ("damaged", &damaged, 2)] {
        let registry = FailingRegistry::start(&layout, Faults::default());
        let cache = dir.path().join(case);
        std::fs::create_dir_all(cache.join("blobs")).unwrap();
        let hex = digest(&layer).replace("sha256:", "");
        std::fs::write(cache.join("blobs").join(format!("{hex}.part")), left).unwrap();
        let image = pull(&cache, &format!("{}/app:v1", registry.host()), &Registries::default()).unwrap();
        assert_eq!(image.digest, wanted);
        let ranges: Vec<_> = registry
            .requests()
            .into_iter()
            .filter(|(path, _)| path.ends_with(&hex))
            .map(|(_, range)| range)
            .collect();
        assert_eq!(ranges.len(), asked, "{case}: {ranges:?}");
        assert_eq!(ranges[0], "bytes=5000-");
    }
}

#[test]
fn what_a_registry_cannot_or_will_not_give_is_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout::new(&dir.path().join("layout"));
    write_image(&layout, "v1");
    let cache = dir.path().join("cache");
    let outcome = |faults: Faults, tag: &str| {
        let registry = FailingRegistry::start(&layout, faults);
        pull(&cache, &format!("{}/app:{tag}", registry.host()), &Registries::default()).unwrap_err()
    };
    let status = |status| Faults { status: Some(status), ..Faults::default() };
    for (error, wanted) in [
        (outcome(Faults::default(), "v9"), 404),
        (outcome(status(403), "v1"), 403),
        (outcome(status(500), "v1"), 502),
        (outcome(status(418), "v1"), 502),
        (outcome(Faults { flip: true, ..Faults::default() }, "v1"), 502),
    ] {
        let class = match &error {
            Error::ImageNotFound { .. } => 404,
            Error::ImageRefused { status, .. } => *status,
            Error::Registry { .. } => 502,
            other => panic!("{other}"),
        };
        assert_eq!(class, wanted, "{error}");
        assert!(error.to_string().contains("/app:v"), "{error}");
    }
    // Nobody listens on a port that was just given back.
    let gone = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let error = pull(&cache, &format!("{gone}/app:v1"), &Registries::default()).unwrap_err();
    assert!(matches!(error, Error::Registry { .. }), "{error}");
    assert_eq!(oci::list(&Store::at(&cache).unwrap()).unwrap().len(), 0);
}

#[test]
fn a_broken_mirror_costs_a_message_and_the_registry_itself_is_asked() {
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout::new(&dir.path().join("layout"));
    let wanted = write_image(&layout, "v1");
    let (broken, sound) = (
        FailingRegistry::start(&layout, Faults { flip: true, ..Faults::default() }),
        FailingRegistry::start(&layout, Faults::default()),
    );
    let mut registries = Registries::default();
    registries.mirrors.insert(sound.host().to_owned(), vec![broken.host().to_owned()]);
    let image = pull(&dir.path().join("cache"), &format!("{}/app:v1", sound.host()), &registries).unwrap();
    assert_eq!(image.digest, wanted);
    assert!(!broken.requests().is_empty() && !sound.requests().is_empty());
}

#[test]
fn an_index_is_followed_to_this_platform_and_never_in_circles() {
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout::new(&dir.path().join("layout"));
    let ours = write_image(&layout, "plain");
    let index_type = "application/vnd.oci.image.index.v1+json";
    let descriptor = |digest: &str, size: usize, architecture: &str| {
        serde_json::json!({ "mediaType": "x", "digest": digest, "size": size,
            "platform": { "os": "linux", "architecture": architecture } })
    };
    let add = |tag: &str, manifests: Vec<serde_json::Value>| {
        let index =
            serde_json::json!({ "schemaVersion": 2, "mediaType": index_type, "manifests": manifests });
        let mut entry = layout.blob(index.to_string().as_bytes(), index_type);
        let digest = entry["digest"].as_str().unwrap().to_owned();
        entry["annotations"] = serde_json::json!({ "org.opencontainers.image.ref.name": tag });
        let path = layout.dir().join("index.json");
        let mut top: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        top["manifests"].as_array_mut().unwrap().push(entry);
        std::fs::write(path, top.to_string()).unwrap();
        (digest, index.to_string().len())
    };
    let other = digest(b"another platform");
    let (inner, size) = add("multi", vec![descriptor(&other, 9, "arm64"), descriptor(&ours, 1, "amd64")]);
    add("foreign", vec![descriptor(&other, 9, "arm64")]);
    let mut deep = (inner, size);
    for depth in 0..4 {
        deep = add(&format!("deep{depth}"), vec![descriptor(&deep.0, deep.1, "amd64")]);
    }
    let registry = FailingRegistry::start(&layout, Faults::default());
    let cache = dir.path().join("cache");
    let pull = |tag: &str| pull(&cache, &format!("{}/app:{tag}", registry.host()), &Registries::default());
    assert_eq!(pull("multi").unwrap().digest, ours);
    assert!(pull("foreign").unwrap_err().to_string().contains("linux/arm64"));
    assert!(pull("deep3").unwrap_err().to_string().contains("without end"));
}

#[test]
fn two_processes_that_pull_one_image_fetch_each_layer_once() {
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout::new(&dir.path().join("layout"));
    write_image(&layout, "v1");
    let registry = FailingRegistry::start(&layout, Faults::default());
    let cache = dir.path().join("cache");
    let name = format!("{}/app:v1", registry.host());
    let start = || {
        let mut command = command(&cache, &["image", "pull", &name]);
        command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn().unwrap()
    };
    let both = [start(), start()];
    let said: Vec<String> = both.map(|child| stdout_of(&child.wait_with_output().unwrap())).to_vec();
    assert_eq!(said[0], said[1]);
    let layer = digest(&compress(&Layer::new().file("one", &noise(300_000)).tar(), Compression::Gzip));
    let fetched = registry.requests().iter().filter(|(path, _)| path.ends_with(&layer)).count();
    assert_eq!(fetched, 1);
    assert!(Reference::parse(&name).is_ok());
}
