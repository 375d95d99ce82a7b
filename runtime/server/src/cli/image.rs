//! `peregrine image`: the images that `run --image` finds by name.

use super::{CliError, progress};
use clap::{Args, Subcommand};
use peregrine_image::Store;
use peregrine_image::oci::{self, ListedImage, Pull, ReadyImage, Registries};
use std::path::PathBuf;

/// Pull, import, show and remove images
///
/// Credentials are those of `docker login`; $PEREGRINE_REGISTRY_MIRRORS (`docker.io=mirror.example …`) names
/// registries to ask first, $PEREGRINE_HTTP_REGISTRIES those spoken to in plain HTTP, besides loopback ones.
///
/// A name is what Docker users expect: `python:3.12`, `ghcr.io/x/y@sha256:…`, `localhost:5000/z`. Names are of
/// `docker.io` unless $PEREGRINE_DEFAULT_REGISTRY names another registry.
#[derive(Debug, Args)]
pub(crate) struct ImageArgs {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Pull an image from its registry, or what its tag means now
    Pull {
        /// Its name
        name: String,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Take an image from an OCI layout directory, or from an archive of one or of `docker save`
    Import {
        /// Directory or archive; `:TAG` behind it chooses one of several images
        #[arg(value_name = "SOURCE")]
        source: String,
        /// What to call it
        #[arg(long, value_name = "NAME")]
        name: String,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Show the images: name, digest, size on disk
    List {
        /// Print one JSON array
        #[arg(long)]
        json: bool,
    },
    /// Show how an image's commands run, and where its file is
    Inspect {
        /// Its name
        name: String,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Take names away; `gc` then gives back the space. Sandboxes made from them go on
    Rm {
        /// Which
        #[arg(required = true, value_name = "NAME")]
        names: Vec<String>,
    },
    /// Remove what no name leads to: images, layers that were kept, downloads broken off
    Gc {
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
}

/// Does the verb; the value is the exit code.
pub(crate) fn image(args: &ImageArgs, cache: Option<PathBuf>) -> Result<u8, CliError> {
    let store = cache.map_or_else(Store::open, |dir| Store::at(&dir))?;
    let registries = Registries::from_env()?;
    match &args.verb {
        Verb::Pull { name, json } => {
            let reference = registries.parse(name)?;
            let mut progress = progress::for_stderr();
            show(&oci::resolve(&store, &reference, Pull::Always, &registries, progress.as_mut())?, *json);
        }
        Verb::Import { source, name, json } => {
            let reference = registries.parse(name)?;
            let image = oci::import(&store, source, &reference, progress::for_stderr().as_mut())?;
            show(&image, *json);
        }
        Verb::List { json } => list(&oci::list(&store)?, *json),
        Verb::Inspect { name, json } => {
            let reference = registries.parse(name)?;
            let found = oci::find(&store, &reference)?;
            let image = found.ok_or(CliError::NoImage { name: reference.familiar() })?;
            inspect(&image, *json);
        }
        Verb::Rm { names } => {
            for name in names {
                let reference = registries.parse(name)?;
                if !oci::remove(&store, &reference)? {
                    return Err(CliError::NoImage { name: reference.familiar() });
                }
                println!("removed {}", reference.familiar());
            }
        }
        Verb::Gc { json } => {
            let collected = oci::collect_garbage(&store)?;
            if *json {
                println!("{}", serde_json::json!(collected));
            } else {
                println!(
                    "removed {} images and {} blobs, {}",
                    collected.images,
                    collected.blobs,
                    mebibytes(collected.bytes)
                );
            }
        }
    }
    Ok(0)
}

fn value(image: &ReadyImage) -> serde_json::Value {
    serde_json::json!({
        "reference": image.reference.to_string(), "digest": image.digest, "key": image.key.as_str(),
        "path": image.path, "config": image.config,
    })
}

fn show(image: &ReadyImage, json: bool) {
    if json {
        println!("{}", value(image));
    } else {
        println!("{} {}", image.reference.familiar(), image.digest);
    }
}

fn list(listed: &[ListedImage], json: bool) {
    if json {
        println!("{}", serde_json::json!(listed));
        return;
    }
    for one in listed {
        let damaged = if one.present { "" } else { "  missing: pull or import it again" };
        let digest = one.digest.get(..19).unwrap_or(&one.digest);
        println!("{:<48} {digest}  {:>10}{damaged}", one.reference, mebibytes(one.disk_bytes));
    }
}

fn inspect(image: &ReadyImage, json: bool) {
    if json {
        println!("{}", value(image));
        return;
    }
    let config = &image.config;
    println!("name         {}\ndigest       {}", image.reference, image.digest);
    println!("file         {}", image.path.display());
    println!("user         {}:{}, home {}", config.user.uid, config.user.gid, config.user.home);
    println!("directory    {}", config.working_dir);
    println!("entrypoint   {:?}\ncommand      {:?}", config.entrypoint, config.cmd);
    config.env.iter().for_each(|entry| println!("environment  {entry}"));
}

fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}
