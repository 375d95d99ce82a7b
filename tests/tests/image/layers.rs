//! Hostile layers: each is refused with a reason, or becomes an image that fsck.erofs finds sound and that holds
//! what it should; and nothing on the host has changed, whatever it was.

use super::host::{Contained, Host, Refused, assert_outcome, import, run};
use peregrine_image::oci::{self, Reference, build_layers};
use peregrine_image::{Silent, Store};
use std::fs;
use std::io::Write as _;
use std::path::Path;
use tar::EntryType;
use tests::oci::{Compression, Layer, Layout, Stored, compress, digest};

fn one(kind: EntryType, path: &str, link: &str) -> Layer {
    Layer::new().entry(&Layer::header(kind, path.as_bytes(), link.as_bytes(), 0), b"")
}

fn device(kind: EntryType, path: &str, major: u32, minor: u32) -> Layer {
    let mut header = Layer::header(kind, path.as_bytes(), b"", 0);
    header.set_device_major(major).unwrap();
    header.set_device_minor(minor).unwrap();
    header.set_cksum();
    Layer::new().entry(&header, b"")
}

#[test]
fn paths_and_links_lead_nowhere_but_into_the_image() {
    let planted = Host::new().planted();
    let file = |path: &str| Layer::new().file(path, b"x");
    run(vec![
        ("upwards", vec![file("../escaped")], Refused("\"..\"")),
        ("upwards further down", vec![file("a/b/../../../escaped")], Refused("\"..\"")),
        ("upwards at the end", vec![one(EntryType::Directory, "a/..", "")], Refused("\"..\"")),
        ("absolute", vec![file("/abs/escaped")], Contained(&["/abs/escaped"], &[])),
        ("many slashes and dots", vec![file("///.//./escaped")], Contained(&["/escaped"], &[])),
        (
            "below a link upwards",
            vec![Layer::new().symlink("up", "..").file("up/escaped", b"x")],
            Contained(&["/escaped"], &[]),
        ),
        (
            "below a link far upwards",
            vec![Layer::new().symlink("up", "../../../..").file("up/tmp/escaped", b"x")],
            Contained(&["/tmp/escaped"], &[]),
        ),
        (
            "below a link to a host directory",
            vec![Layer::new().symlink("l", &planted).file("l/escaped", b"x")],
            Contained(&["/l"], &["/escaped"]),
        ),
        (
            "the same across layers",
            vec![Layer::new().symlink("l", "/etc"), file("l/escaped")],
            Contained(&["/etc/escaped"], &[]),
        ),
        (
            "a link in a link's way",
            vec![Layer::new().symlink("a", "b").symlink("b", "/c"), file("a/escaped")],
            Contained(&["/c/escaped"], &[]),
        ),
        (
            "links in a circle",
            vec![Layer::new().symlink("a", "b").symlink("b", "a").file("a/x", b"x")],
            Refused("too many symbolic links"),
        ),
        (
            "a link to itself",
            vec![Layer::new().symlink("a", "a").file("a/x", b"x")],
            Refused("too many symbolic links"),
        ),
        (
            "a file over a link",
            vec![Layer::new().symlink("l", "/etc/passwd").file("l", b"x")],
            Contained(&["/l"], &["/etc"]),
        ),
        (
            "a directory over a link",
            vec![Layer::new().symlink("l", "/etc").directory("l").file("l/x", b"x")],
            Contained(&["/l/x"], &["/etc"]),
        ),
        ("a link to nowhere", vec![one(EntryType::Symlink, "l", "")], Refused("link to nowhere")),
        ("a hard link upwards", vec![Layer::new().link("h", "../outside")], Refused("\"..\"")),
        (
            "a hard link to the host's shadow",
            vec![Layer::new().link("h", "/etc/shadow")],
            Refused("not there"),
        ),
        (
            "a hard link through a link",
            vec![Layer::new().symlink("l", "/etc").link("h", "l/shadow")],
            Refused("not there"),
        ),
        (
            "a hard link to a link to the host",
            vec![Layer::new().symlink("l", "/etc/shadow").link("h", "l").file("h", b"x")],
            Contained(&["/l", "/h"], &["/etc"]),
        ),
        (
            "a hard link to a directory",
            vec![Layer::new().directory("d").link("h", "d")],
            Refused("to a directory"),
        ),
        ("a hard link to itself", vec![Layer::new().link("h", "h")], Refused("not there")),
        ("a hard link to the root", vec![Layer::new().link("h", "/")], Refused("to the root")),
        (
            "below a file",
            vec![Layer::new().file("f", b"x").file("f/escaped", b"x")],
            Refused("not a directory"),
        ),
        (
            "below a device",
            vec![device(EntryType::Char, "d", 1, 3), file("d/escaped")],
            Refused("not a directory"),
        ),
        ("a file for the root", vec![file("./")], Refused("root directory")),
        (
            "a name of 300 bytes",
            vec![Layer::new().pax(&[("path", &[b'n'; 300])]).file("x", b"x")],
            Refused("255 bytes"),
        ),
        (
            "a path of 5000 bytes",
            vec![Layer::new().pax(&[("path", &b"ab/".repeat(1700))]).file("x", b"x")],
            Refused("longer than any path"),
        ),
        (
            "500 directories deep",
            vec![Layer::new().pax(&[("path", &b"a/".repeat(500))]).file("x", b"x")],
            Contained(&["/a/a/a/a/a/a"], &[]),
        ),
        ("a NUL in a path", vec![Layer::new().pax(&[("path", b"a\0b")]).file("x", b"x")], Refused("NUL")),
        (
            "a NUL in a link",
            vec![Layer::new().pax(&[("linkpath", b"a\0b")]).symlink("l", "x")],
            Refused("link to nowhere"),
        ),
    ]);
}

#[test]
fn kinds_owners_and_attributes_are_data_or_refused() {
    let with = |change: &dyn Fn(&mut tar::Header)| {
        let mut header = Layer::header(EntryType::Regular, b"x", b"", 0);
        change(&mut header);
        header.set_cksum();
        Layer::new().entry(&header, b"")
    };
    run(vec![
        ("the memory of the host", vec![device(EntryType::Char, "mem", 1, 1)], Contained(&["/mem"], &[])),
        (
            "a disk of the host",
            vec![device(EntryType::Block, "dev/sda", 8, 0)],
            Contained(&["/dev/sda"], &[]),
        ),
        (
            "an overlay's whiteout",
            vec![Layer::new().file("x", b"x"), device(EntryType::Char, "x", 0, 0)],
            Contained(&["/x"], &[]),
        ),
        (
            "a device that cannot be",
            vec![device(EntryType::Char, "d", 4096, 0)],
            Refused("device whose number"),
        ),
        ("a pipe", vec![one(EntryType::Fifo, "p", "")], Contained(&["/p"], &[])),
        (
            "an unknown kind",
            vec![one(EntryType::new(b'Z'), "z", "")],
            Refused("kind that layers do not have"),
        ),
        (
            "GNU's sparse files",
            vec![one(EntryType::GNUSparse, "s", "")],
            Refused("kind that layers do not have"),
        ),
        (
            "sparse files of pax",
            vec![Layer::new().pax(&[("GNU.sparse.major", b"1")]).file("s", b"x")],
            Refused("sparse"),
        ),
        ("set-user-ID for all", vec![with(&|h| h.set_mode(0o6777))], Contained(&["/x"], &[])),
        ("a user beyond 32 bits", vec![with(&|h| h.set_uid(1 << 40))], Refused("user number")),
        (
            "a group beyond 32 bits",
            vec![Layer::new().pax(&[("gid", b"4294967296")]).file("x", b"")],
            Refused("group number"),
        ),
        (
            "a time before 1970",
            vec![Layer::new().pax(&[("mtime", b"-5.5")]).file("x", b"")],
            Contained(&["/x"], &[]),
        ),
        (
            "an overlay's attributes",
            vec![
                Layer::new()
                    .pax(&[
                        ("SCHILY.xattr.trusted.overlay.redirect", b"/etc"),
                        ("SCHILY.xattr.system.x", b"y"),
                        ("SCHILY.xattr.user.ok", b"v"),
                    ])
                    .file("x", b"x"),
            ],
            Contained(&["/x"], &[]),
        ),
        (
            "70 KiB of attributes",
            vec![Layer::new().pax(&[("SCHILY.xattr.user.a", &[1; 70_000])]).file("x", b"x")],
            Refused("extended attributes"),
        ),
        (
            "60 KiB of attributes",
            vec![Layer::new().pax(&[("SCHILY.xattr.user.a", &[1; 60_000])]).file("x", &[2; 600])],
            Contained(&["/x"], &[]),
        ),
        (
            "attributes and a large directory",
            vec![(0..2000).fold(
                Layer::new().pax(&[("SCHILY.xattr.user.a", &[1; 3000])]).directory("d"),
                |layer, n| layer.file(&format!("d/file-{n}"), b"x"),
            )],
            Contained(&["/d/file-0", "/d/file-1999"], &["/d/file-2000"]),
        ),
    ]);
}

#[test]
fn whiteouts_hide_what_lower_layers_have_and_nothing_else() {
    let base = || Layer::new().file("a/one", b"1").file("a/two", b"2").file("b", b"b");
    run(vec![
        (
            "one name",
            vec![base(), Layer::new().file("a/.wh.one", b"")],
            Contained(&["/a/two", "/b"], &["/a/one", "/a/.wh.one"]),
        ),
        ("a directory", vec![base(), Layer::new().file(".wh.a", b"")], Contained(&["/b"], &["/a"])),
        (
            "a directory with something new, before it",
            vec![base(), Layer::new().file(".wh.a", b"").file("a/new", b"n")],
            Contained(&["/a/new"], &["/a/one"]),
        ),
        (
            "the same, after it",
            vec![base(), Layer::new().file("a/new", b"n").file(".wh.a", b"")],
            Contained(&["/a/new"], &["/a/one"]),
        ),
        (
            "opaque, before",
            vec![base(), Layer::new().file("a/.wh..wh..opq", b"").file("a/new", b"n")],
            Contained(&["/a/new", "/b"], &["/a/one", "/a/two"]),
        ),
        (
            "opaque, after",
            vec![base(), Layer::new().file("a/new", b"n").file("a/.wh..wh..opq", b"")],
            Contained(&["/a/new", "/b"], &["/a/one", "/a/two"]),
        ),
        (
            "an opaque root",
            vec![base(), Layer::new().file(".wh..wh..opq", b"").file("c", b"c")],
            Contained(&["/c"], &["/a", "/b"]),
        ),
        (
            "what is not there",
            vec![base(), Layer::new().file("x/y/.wh.z", b"").file(".wh.nothing", b"")],
            Contained(&["/a/one"], &["/x"]),
        ),
        ("in its own layer", vec![Layer::new().file("x", b"x").file(".wh.x", b"")], Contained(&["/x"], &[])),
        (
            "through a link to the host",
            vec![base().symlink("l", "/a"), Layer::new().file("l/.wh.one", b"")],
            Contained(&["/a/two", "/l"], &["/a/one"]),
        ),
        (
            "one of two hard links",
            vec![base().link("h", "a/one"), Layer::new().file("a/.wh.one", b"")],
            Contained(&["/h"], &["/a/one"]),
        ),
        ("below a file", vec![base(), Layer::new().file("b/.wh.x", b"")], Contained(&["/b"], &[])),
        ("no name", vec![base(), Layer::new().file(".wh.", b"")], Refused("no name")),
        ("the directory itself", vec![base(), Layer::new().file("a/.wh..", b"")], Refused("no name")),
        ("the directory above", vec![base(), Layer::new().file("a/.wh...", b"")], Refused("no name")),
        ("upwards", vec![base(), Layer::new().file("../.wh.outside", b"")], Refused("\"..\"")),
    ]);
}

#[test]
fn archives_mean_one_thing_only() {
    let hidden = Layer::new().file("hidden", b"x").unended();
    let mut torn = Layer::header(EntryType::Regular, b"x", b"", 0);
    torn.as_mut_bytes()[0] = b'y';
    let mut huge = Layer::header(EntryType::Regular, b"x", b"", 0);
    huge.as_old_mut().size = [0xff; 12];
    huge.set_cksum();
    let extension = |kind, size| Layer::new().raw(Layer::header(kind, b"x", b"", size).as_bytes());
    let bare_pax = |text: &[u8]| {
        Layer::new()
            .entry(&Layer::header(EntryType::XHeader, b"p", b"", text.len() as u64), text)
            .file("x", b"x")
    };
    run(vec![
        // The header says 0 bytes, pax says 1024: who follows the header finds an entry that is a file's contents.
        (
            "a size of pax over the header's",
            vec![
                Layer::new()
                    .pax(&[("size", b"1024")])
                    .raw(Layer::header(EntryType::Regular, b"cover", b"", 0).as_bytes())
                    .raw(&hidden),
            ],
            Contained(&["/cover"], &["/hidden"]),
        ),
        (
            "a size of pax under the header's",
            vec![
                Layer::new()
                    .pax(&[("size", b"0")])
                    .raw(Layer::header(EntryType::Regular, b"cover", b"", 1024).as_bytes())
                    .raw(&hidden),
            ],
            Contained(&["/cover", "/hidden"], &[]),
        ),
        (
            "a link with contents",
            vec![
                Layer::new()
                    .file("f", b"x")
                    .raw(Layer::header(EntryType::Link, b"h", b"f", 1024).as_bytes())
                    .raw(&hidden),
            ],
            Refused("contents, which its kind cannot"),
        ),
        (
            "a directory with contents",
            vec![
                Layer::new()
                    .raw(Layer::header(EntryType::Directory, b"d", b"", 1024).as_bytes())
                    .raw(&hidden),
            ],
            Refused("contents, which its kind cannot"),
        ),
        ("a wrong checksum", vec![Layer::new().raw(torn.as_bytes())], Refused("checksum")),
        ("a negative size", vec![Layer::new().raw(huge.as_bytes())], Refused("number in its header")),
        (
            "more contents than there are",
            vec![Layer::new().raw(Layer::header(EntryType::Regular, b"x", b"", 1 << 30).as_bytes())],
            Refused("ends within an entry"),
        ),
        (
            "a pax header of a gigabyte",
            vec![extension(EntryType::XHeader, 1 << 30)],
            Refused("extended header of 1073741824"),
        ),
        (
            "a long name of a gigabyte",
            vec![extension(EntryType::GNULongName, 1 << 30)],
            Refused("extended header of 1073741824"),
        ),
        (
            "a global header of a gigabyte",
            vec![extension(EntryType::XGlobalHeader, 1 << 30)],
            Refused("extended header of 1073741824"),
        ),
        ("a pax header without an entry", vec![Layer::new().pax(&[("path", b"x")])], Refused("no entry")),
        (
            "a pax record of length 0",
            vec![bare_pax(b"0 path=x\n")],
            Refused("pax header that cannot be read"),
        ),
        (
            "a pax record longer than its header",
            vec![bare_pax(b"99 path=x\n")],
            Refused("pax header that cannot be read"),
        ),
        (
            "a pax record without a length",
            vec![bare_pax(b"path=x\n")],
            Refused("pax header that cannot be read"),
        ),
        (
            "a pax record of endless digits",
            vec![bare_pax(&[b'9'; 600])],
            Refused("pax header that cannot be read"),
        ),
        (
            "a pax size that is no number",
            vec![Layer::new().pax(&[("size", b"0x10")]).file("x", b"")],
            Refused("bad size"),
        ),
        (
            "zeros amid the entries",
            vec![Layer::new().file("a", b"x").raw(&[0; 512]).file("b", b"x")],
            Refused("one block of zeros"),
        ),
        (
            "something behind the end",
            vec![Layer::new().file("a", b"x").raw(&[0; 1024]).file("b", b"x")],
            Contained(&["/a"], &["/b"]),
        ),
        ("no tar at all", vec![Layer::new().raw(&[b'n'; 2048])], Refused("checksum")),
        ("an empty archive", vec![Layer::new()], Contained(&["/"], &[])),
        ("no layers", vec![], Contained(&["/"], &[])),
    ]);
}

#[test]
fn digests_sizes_and_ends_are_those_that_were_promised() {
    let host = Host::new();
    let tar = Layer::new().file("file", &[7; 100_000]).tar();
    let falsified = |change: &dyn Fn(&Layout, &mut Stored)| {
        let layout = Layout::new(&tempfile::tempdir_in(host.dir.path()).unwrap().keep());
        let mut stored = layout.layer(&tar, Compression::Gzip);
        change(&layout, &mut stored);
        layout.image("t", &serde_json::json!({}), &[stored]);
        import(&host, &layout)
    };
    let replaced = |bytes: Vec<u8>| {
        falsified(&move |layout, stored| {
            let digest = stored.descriptor["digest"].as_str().unwrap().to_owned();
            fs::write(layout.dir().join("blobs").join(digest.replace(':', "/")), &bytes).unwrap();
            stored.descriptor["size"] = bytes.len().into();
        })
    };
    let stored_as = |bytes: Vec<u8>| {
        falsified(&move |layout, stored| {
            stored.descriptor = layout.blob(&bytes, "x");
        })
    };
    let gzip = compress(&tar, Compression::Gzip);
    let zstd = compress(&tar, Compression::Zstd);
    // A frame header that asks for a window of 2 GiB (RFC 8878, section 3.1.1.1.2).
    let window = [0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xa8, 0x01, 0x00, 0x00].to_vec();
    let cases = [
        (
            "other bytes",
            replaced(compress(&Layer::new().file("x", b"x").tar(), Compression::Gzip)),
            "the manifest says",
        ),
        (
            "a wrong diff ID",
            falsified(&|_, stored| stored.diff_id = digest(b"other")),
            "the configuration says",
        ),
        (
            "a smaller size",
            falsified(&|_, stored| stored.descriptor["size"] = 10.into()),
            "more than the 10 bytes",
        ),
        (
            "a larger size",
            falsified(&|_, stored| stored.descriptor["size"] = 1_000_000.into()),
            "the manifest says 1000000",
        ),
        ("gzip cut short", stored_as(gzip[..gzip.len() / 2].to_vec()), "layer"),
        ("zstd cut short", stored_as(zstd[..zstd.len() - 5].to_vec()), "layer"),
        ("tar cut short", stored_as(tar[..50_000].to_vec()), "ends within an entry"),
        ("gzip with garbage behind", stored_as([&gzip[..], b"garbage"].concat()), "layer"),
        ("gzip in gzip", stored_as(compress(&gzip, Compression::Gzip)), "layer"),
        ("a window of 2 GiB", stored_as(window), "layer"),
        ("no bytes", stored_as(Vec::new()), "the configuration says"),
        (
            "a digest that is a path",
            falsified(&|_, stored| stored.descriptor["digest"] = "sha256:../../../../etc/shadow".into()),
            "no sha256 digest",
        ),
        (
            "a blob that is not there",
            falsified(&|_, stored| stored.descriptor["digest"] = digest(b"nothing").into()),
            "cannot be read",
        ),
        (
            "a size below zero",
            falsified(&|_, stored| stored.descriptor["size"] = (-1).into()),
            "cannot be read",
        ),
    ];
    for (case, (image, result), words) in cases {
        assert_outcome(&host, case, &image, result, &Refused(words));
    }
}

#[test]
fn bombs_end_at_their_limits() {
    let host = Host::new();
    let image = |name: &str| host.dir.path().join(name);
    let zeros = Layer::new().file("zeros", &vec![0; 48 << 20]).tar();
    let many = (0..3000).fold(Layer::new(), |layer, n| layer.file(&format!("f{n}"), b"")).tar();
    for (case, layer, most_bytes, words) in [
        ("gzip", best_gzip(&zeros), 32 << 20, "grows more than 200-fold"),
        ("zstd", compress(&zeros, Compression::Zstd), 32 << 20, "grows more than 200-fold"),
        ("total", zeros.clone(), 32 << 20, "an image may have"),
        ("entries", compress(&many, Compression::Zstd), 1 << 30, "one too many"),
    ] {
        let result = build_layers(&image(case), &[&layer], most_bytes, 2500);
        assert_outcome(&host, case, &image(case), result, &Refused(words));
    }
    // Half the limit each, which only together is too much.
    let half = Layer::new().file("half", &[1; 20 << 20]).tar();
    let result = build_layers(&image("two"), &[&half, &half], 32 << 20, 10);
    assert_outcome(&host, "two layers", &image("two"), result, &Refused("an image may have"));
    build_layers(&image("sound"), &[&many], 1 << 30, 3000).unwrap();
}

#[test]
fn archives_of_docker_save_name_their_members_and_nothing_of_the_host() {
    let host = Host::new();
    let layer = Layer::new().file("file", b"x").tar();
    let config = serde_json::json!({ "os": "linux", "architecture": "amd64",
        "rootfs": { "type": "layers", "diff_ids": [digest(&layer)] } });
    let saved = |config_name: &str, layer_name: &str, archive: Layer| {
        let manifest =
            serde_json::json!([{ "Config": config_name, "RepoTags": ["x:v1"], "Layers": [layer_name] }]);
        let path = host.dir.path().join("saved.tar");
        let archive = archive.file("manifest.json", manifest.to_string().as_bytes());
        fs::write(&path, compress(&archive.tar(), Compression::Gzip)).unwrap();
        let store = Store::at(&host.dir.path().join("cache")).unwrap();
        let source = format!("{}:v1", path.display());
        let image = oci::import(&store, &source, &Reference::parse("saved").unwrap(), &mut Silent);
        fs::remove_file(&path).unwrap();
        image.map(|image| image.path)
    };
    let whole = || Layer::new().file("c.json", config.to_string().as_bytes()).file("a/layer.tar", &layer);
    let image = saved("c.json", "a/layer.tar", whole()).unwrap();
    assert_outcome(&host, "sound", &image, Ok(()), &Contained(&["/file"], &[]));
    let linked = whole().symlink("b/layer.tar", "../a/layer.tar");
    saved("c.json", "b/layer.tar", linked).unwrap();
    let planted = format!("{}/secret", host.planted());
    for (case, config_name, layer_name, archive) in [
        ("a configuration of the host", planted.as_str(), "a/layer.tar", whole()),
        ("a layer of the host", "c.json", planted.as_str(), whole()),
        ("a layer upwards", "c.json", "../outside", whole()),
        ("a link to the host", "c.json", "l", whole().symlink("l", &planted)),
        ("a link to itself", "c.json", "l", whole().symlink("l", "l")),
    ] {
        let error = saved(config_name, layer_name, archive).unwrap_err();
        assert_outcome(&host, case, Path::new(""), Err(error), &Refused("it has no "));
    }
}

#[test]
fn the_same_layers_make_the_same_bytes_however_they_are_compressed() {
    let dir = tempfile::tempdir().unwrap();
    let base = (0..300)
        .fold(Layer::new(), |layer, n| layer.file(&format!("d{}/f{n}", n % 7), &vec![n as u8; n * 37]));
    let top = Layer::new().file("d1/.wh.f1", b"").link("hard", "d2/f2").symlink("soft", "hard");
    let build = |name: &str, compression| {
        let path = dir.path().join(name);
        let layers = [compress(&base.tar(), compression), compress(&top.tar(), compression)];
        build_layers(&path, &[&layers[0], &layers[1]], 1 << 30, 10_000).unwrap();
        digest(&fs::read(path).unwrap())
    };
    let first = build("1", Compression::Gzip);
    assert_eq!(build("2", Compression::Gzip), first);
    assert_eq!(build("3", Compression::Zstd), first);
    assert_eq!(build("4", Compression::Plain), first);
}

/// As compressible as gzip can make it: over a thousandfold.
fn best_gzip(bytes: &[u8]) -> Vec<u8> {
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    gzip.write_all(bytes).unwrap();
    gzip.finish().unwrap()
}
