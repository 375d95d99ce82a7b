//! Images from a directory or an archive, and what a command finds in one.

use super::{peregrine_in, stdout_of, text};
use peregrine_image::oci::{self, Reference};
use peregrine_image::{Silent, Store};
use tests::daemon::Daemon;
use tests::kvm_or_skip;
use tests::oci::{Compression, Layer, Layout, busybox_layer, debian_tools};

const APPLETS: &[&str] = &["sh", "cat", "id", "env", "pwd", "ls", "stat"];

/// An image of three layers, stored in different ways, that has no /proc, /dev, /sys, /tmp and /run.
fn write_image(layout: &Layout, middle_compression: Compression) {
    let base = busybox_layer(APPLETS)
        .file("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\napp:x:1000:1001::/home/app:/bin/sh\n")
        .file("data/hidden", b"lower")
        .file("data/kept", b"lower");
    let middle = Layer::new().file("data/.wh.hidden", b"").file("data/new", &[b'n'; 10_000]);
    let top = Layer::new().pax(&[("SCHILY.xattr.user.colour", b"blue")]).file("home/app/note", b"a note\n");
    let layers = [
        layout.layer(&base.tar(), Compression::Gzip),
        layout.layer(&middle.tar(), middle_compression),
        layout.layer(&top.tar(), Compression::Plain),
    ];
    let config = serde_json::json!({
        "Env": ["PATH=/bin", "GREETING=from the image", "PLACE=image"], "WorkingDir": "/home/app/work", "User": "app",
        "Entrypoint": ["/bin/sh", "-c"], "Cmd": ["id; pwd; echo $GREETING $HOME"],
    });
    layout.image("v1", &config, &layers);
}

#[test]
fn a_layout_is_imported_and_its_configuration_is_how_commands_run() {
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout::new(&dir.path().join("layout"));
    write_image(&layout, Compression::Zstd);
    let cache = dir.path().join("cache");
    let source = format!("{}:v1", layout.dir().display());
    let imported =
        stdout_of(&peregrine_in(&cache, &["image", "import", &source, "--name", "app:test", "--json"]));
    let imported: serde_json::Value = serde_json::from_str(&imported).unwrap();
    assert_eq!(imported["reference"], "docker.io/library/app:test");
    assert_eq!(imported["config"]["user"]["gid"], 1001);
    let listed = stdout_of(&peregrine_in(&cache, &["image", "list", "--json"]));
    let listed: serde_json::Value = serde_json::from_str(&listed).unwrap();
    assert_eq!(listed[0]["digest"], imported["digest"]);
    if !kvm_or_skip("a_layout_is_imported_and_its_configuration_is_how_commands_run") {
        return;
    }

    let default = peregrine_in(&cache, &["run", "--image", "app:test"]);
    assert_eq!(
        stdout_of(&default),
        "uid=1000(app) gid=1001\n/home/app/work\nfrom the image /home/app\n",
        "{}",
        text(&default.stderr)
    );
    let script = "cat ../note; echo $PLACE; ls /data; cat /data/kept; stat -c %s /data/new; id -u; ls -d /proc/1 /dev/null /tmp";
    let given = peregrine_in(
        &cache,
        &["run", "--image", "app:test", "--user", "0:7", "-e", "PLACE=caller", "--", "sh", "-c", script],
    );
    let wanted = "a note\ncaller\nkept\nnew\nlower10000\n0\n/dev/null\n/proc/1\n/tmp\n";
    assert_eq!(stdout_of(&given), wanted, "{}", text(&given.stderr));
    // The template was made by the first run.
    assert!(!text(&given.stderr).contains("template"), "{}", text(&given.stderr));

    // The API runs an image's commands as the command line does.
    let daemon = Daemon::start_with("", &["--cache", cache.to_str().unwrap()]);
    let wanted = ["uid=1000(app) gid=1001", "/home/app/work", "from the image /home/app"];
    let said = daemon.node("image.mjs", &[&["app:test"], &wanted[..]].concat());
    assert!(said.status.success(), "{}{}", text(&said.stdout), text(&said.stderr));
}

#[test]
fn archives_of_skopeo_are_the_image_that_they_were_made_from() {
    debian_tools(&["skopeo"]);
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout::new(&dir.path().join("layout"));
    // Docker's format has no zstd.
    write_image(&layout, Compression::Gzip);
    let store = Store::at(&dir.path().join("cache")).unwrap();
    let import = |source: &str| {
        let name = Reference::parse("some/app").unwrap();
        oci::import(&store, source, &name, &mut Silent).unwrap_or_else(|e| panic!("{source}: {e}"))
    };
    let wanted = import(layout.dir().to_str().unwrap());
    for (format, name) in [("docker-archive", "docker.tar"), ("oci-archive", "oci.tar")] {
        let path = dir.path().join(name);
        let output = std::process::Command::new("skopeo")
            .args(["--insecure-policy", "copy", "--quiet"])
            .arg(format!("oci:{}:v1", layout.dir().display()))
            .arg(format!("{format}:{}:app:v2", path.display()))
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        let found = import(path.to_str().unwrap());
        // The same layers, however they are stored, are the same file and so the same template.
        assert_eq!(
            (&found.key, &found.path, &found.config),
            (&wanted.key, &wanted.path, &wanted.config),
            "{format}"
        );
    }
}

#[test]
fn names_and_sources_that_are_wrong_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout::new(&dir.path().join("layout"));
    write_image(&layout, Compression::Zstd);
    let cache = dir.path().join("cache");
    let source = layout.dir().display().to_string();
    let elsewhere = format!("{source}:v2");
    for (args, words) in [
        (&["import", "/nonexistent/image.tar", "--name", "x"][..], &["/nonexistent/image.tar"][..]),
        (&["import", &elsewhere, "--name", "x"], &["no tag \"v2\""]),
        (&["import", &source, "--name", "Bad Name"], &["\"Bad Name\"", "lower-case"]),
        (&["import", "/dev/null", "--name", "x"], &["/dev/null", "neither a file nor a directory"]),
        (&["inspect", "not/here"], &["not/here:latest", "not here"]),
        (&["rm", "not/here"], &["not/here:latest", "not here"]),
    ] {
        let output = peregrine_in(&cache, &[&["image"], args].concat());
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(125), "{args:?}: {said}");
        words.iter().for_each(|word| assert!(said.contains(word), "{args:?}: {said}"));
    }
}
